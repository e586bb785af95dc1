"""How long lookups take, phase by phase, beside plain torch and FBGEMM."""
