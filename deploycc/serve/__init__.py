"""From a build to what serves it: bundles for the C++ runner, model repositories for Triton."""
