"""Other packages' interfaces over this package's operations; each module needs its package, and is imported by name."""
