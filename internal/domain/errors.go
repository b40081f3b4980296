package domain

import "errors"

var (
	// ErrNoMachine reports that the process asked for is gone.
	ErrNoMachine = errors.New("no such machine process")
	// ErrIDTaken reports that a new record's id exists already: draw again.
	ErrIDTaken = errors.New("workspace id taken")
)
