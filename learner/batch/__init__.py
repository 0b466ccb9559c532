"""How completions become forward passes: packing, and which models may be packed."""
