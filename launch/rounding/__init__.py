"""Parts of `launch.ptq`: what to quantize how, on which text, and how it is measured and told."""
