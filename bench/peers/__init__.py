"""What users would pick instead of mtlgrad, behind small adapters."""
