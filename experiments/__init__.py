"""Scripts that each answer one question about hetero_jax (absl flags), with the workloads and tables they share.

They use the public API as a user would: ``import hetero_jax`` and nothing behind it.
"""
