"""Third-party weights, imported and exported: one module per origin, every conversion verified."""
