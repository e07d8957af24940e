"""Names of Ray that its public API does not have, one module per library: why each is needed, and what happens without
it. All were read in Ray 2.58.1, 2.59.0 and 2.60.0."""
