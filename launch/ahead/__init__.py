"""Compiling for TPUs that are not there: slices, the compiled step, meshes that fit, the report."""
