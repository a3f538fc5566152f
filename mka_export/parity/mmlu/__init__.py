"""MMLU (Hendrycks et al., arXiv 2009.03300): the same questions, byte for byte, for every runtime."""
