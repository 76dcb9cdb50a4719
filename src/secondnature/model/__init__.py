"""The models: made around shared memory (`load`), computing in fp32 from bf16 (`upcast`)."""
