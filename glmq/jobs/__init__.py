"""One file a verb: options -> plan -> folder, resume, ranks -> result. Nothing is printed; `watch` is told."""
