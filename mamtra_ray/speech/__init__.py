"""Speech tokens, sound and recognition: what turns a language model's tokens into a word error rate."""
