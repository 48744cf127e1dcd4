"""What people look at: words, HTML that nothing breaks out of, plots that fit light and dark."""
