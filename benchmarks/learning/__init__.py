"""What training learns, on tiny models and synthetic data whose truth is known, over several seeds."""
