"""First-order estimates of effects, from gradients."""
