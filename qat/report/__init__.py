"""Reports: what result rows and a fitted law say, in words, figures and one self-contained page."""
