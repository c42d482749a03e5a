"""Is a checkpoint right? Its files, its integers, what each engine looks up, how it answers."""
