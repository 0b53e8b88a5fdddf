"For whoever compares: the methods that stand beside CSE in the paper's tables, with the same `fit` and `score`."
