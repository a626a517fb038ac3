"""Attribution graphs of single prompts: trace, prune, compare, check, keep."""
