"""What all methods share: the contract, the registry, the report, and the pieces that several methods are built from."""
