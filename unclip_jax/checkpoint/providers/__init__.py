"""Tables of rules for `convert`, a file for each provider of weights, with what turns its configurations into ours."""
