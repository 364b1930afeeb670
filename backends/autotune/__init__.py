"""Which parallel method is the fastest: estimated, then tried."""
