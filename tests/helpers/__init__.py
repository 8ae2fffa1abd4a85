"""What several tests share: tiny models, drawn data, and commands run as a user runs them."""
