"""The stock pipeline as a differentiable program: its parts, the rollout, the gradient rules, LoRA layers."""
