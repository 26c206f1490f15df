"""What this package relies on in other libraries beyond their documented interfaces, each thing once."""
