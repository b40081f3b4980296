package files

import (
	"errors"
	"io"
	"os"
	"slices"
)

// readNames returns the sorted names in dir; more than limit is an error. It
// holds no descriptor afterwards, so that deep trees do not use them up.
func readNames(dir string, limit int) ([]string, error) {
	f, err := os.Open(dir)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	var names []string
	for {
		part, err := f.Readdirnames(1024)
		names = append(names, part...)
		if len(names) > limit {
			return nil, tooMany(limit)
		}
		if errors.Is(err, io.EOF) {
			slices.Sort(names)
			return names, nil
		}
		if err != nil {
			return nil, err
		}
	}
}
