"""The gates of the gated delta rule: decay and write strength of a head."""
