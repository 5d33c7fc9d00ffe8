"""The vocabulary of deploycc: errors, formats, targets, artefacts, passes, contracts, plans and reports."""
