"""From a source of pictures to examples: open, check, split, weigh, augment, cache, sample."""
