"""How good an answer is: small pure functions, the same for evaluation and reinforcement learning."""
