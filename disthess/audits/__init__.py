"""Curvature of checkpoints, measured again and again: what is measured, kept, compared and alerted on."""
