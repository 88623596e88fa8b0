"""Decoding as pure logic: the algorithm, its oracle, a request's state. No Triton, no vLLM."""
