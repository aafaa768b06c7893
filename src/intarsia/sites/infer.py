infer = verify = Disagreement = None
