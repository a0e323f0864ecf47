"""What the tuner must beat, and the referee who says whether it did."""
