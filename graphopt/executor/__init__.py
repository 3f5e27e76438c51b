"""Running plans: generated code per block, plans as immutable values, publication by one store."""
