"""From hypotheses to a word error rate that can be trusted."""
