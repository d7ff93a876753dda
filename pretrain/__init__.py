"""How a backbone learns without labels."""
