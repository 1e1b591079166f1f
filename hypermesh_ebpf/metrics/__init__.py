"""What was read from a session, as values: samples, events, loss, rates and histograms."""
