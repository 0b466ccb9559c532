"""What a run writes down about itself: metrics, the console, trackers and signs of trouble."""
