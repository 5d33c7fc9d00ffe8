"""Execute a repaired model beside the original."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from deploycc import registry
from deploycc.core.errors import BackendError, ContractError, UsageError
from deploycc.core.passes import PassResult
from deploycc.core.shapes import probe_shapes, profiles_for
from deploycc.instruments import VerifyEach, random_feeds

if TYPE_CHECKING:
    from typing import ClassVar

    import onnx_ir as ir

    from deploycc.core.passes import Phase

SEED = 0


@dataclass(frozen=True, slots=True)
class Repairs:
    """All safe repairs as one pass, for the instrument that compares graphs."""

    phase: ClassVar[Phase] = "canonicalize"
    after: ClassVar[tuple[str, ...]] = ()

    def __call__(self, model: ir.Model) -> PassResult:
        """Do nothing: the repairs have run."""
        return PassResult()


def proof(original: ir.Model, repaired: ir.Model) -> list[str]:
    """Return what the comparison on random inputs says, in one sentence.

    Raises:
        ContractError: when an output moves by more than rounding explains.
    """
    reference = registry.backend("onnxruntime")
    try:
        profiles, _ = profiles_for(original.graph.inputs, ())
        shapes, _ = probe_shapes(original.graph.inputs, profiles)
        feeds = random_feeds(original.graph.inputs, shapes, seed=SEED)
        run = reference.executor(original)
        for each in feeds:
            run(each)
    except (UsageError, BackendError) as error:
        return [f"not compared with the original, which does not run here: {error.what}"]
    verify = VerifyEach(reference, feeds)
    objection = verify.after(Repairs(), original, repaired)
    if objection:
        raise ContractError(objection, at="the repaired model", fix="this is a defect of deploycc; report it with the model")
    return [f"compared with the original on {len(feeds)} random inputs: outputs differ by {max(verify.worst.values()):.1g} of their range"]
