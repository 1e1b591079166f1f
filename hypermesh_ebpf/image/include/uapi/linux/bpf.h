/* Must be empty: BCC brings its own copy of this header. */
