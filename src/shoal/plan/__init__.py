"""Who runs which blocks: pure decisions on measured values."""
