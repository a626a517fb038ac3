def train_dictionaries(out): raise SystemExit
