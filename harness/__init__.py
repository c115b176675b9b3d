"""What all methods have in common: specs, data, training, evaluation, cost, latency, records, leaderboard."""
