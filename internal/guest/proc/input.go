package proc

import (
	"context"
	"errors"
	"fmt"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

var (
	errInputClosed = errors.New("standard input is closed")
	errNoInput     = errors.New("process was started without standard input")
	errBrokenPipe  = errors.New("process no longer reads its standard input")
)

// endOfTransmission is what Ctrl-D sends: a terminal turns it into an end of
// file for whoever reads a line.
const endOfTransmission = 4

// input is the writing side of a process's standard input: a pipe, or a
// terminal's master. Writers take turns; a process that does not read blocks
// its writers and nobody else.
type input struct {
	file     *os.File      // non-blocking
	terminal bool          // file is a master and not the input's to close
	turn     chan struct{} // capacity 1: held by the writer
}

func newInput(f *os.File, terminal bool) *input {
	return &input{file: f, terminal: terminal, turn: make(chan struct{}, 1)}
}

// write writes all of b, or returns how it ended: ctx's error (some of b may
// have been written; the text says how much), errInputClosed, errBrokenPipe.
func (in *input) write(ctx context.Context, b []byte) error {
	select {
	case in.turn <- struct{}{}:
	case <-ctx.Done():
		return ctx.Err()
	}
	defer func() { <-in.turn }()

	interrupted := make(chan struct{})
	stop := context.AfterFunc(ctx, func() {
		defer close(interrupted)
		_ = in.file.SetWriteDeadline(time.Now().Add(-time.Second))
	})
	n, err := in.file.Write(b)
	if !stop() {
		<-interrupted
		_ = in.file.SetWriteDeadline(time.Time{})
	}
	switch {
	case err == nil:
		return nil
	case errors.Is(err, os.ErrDeadlineExceeded):
		return fmt.Errorf("wrote %d of %d bytes: %w", n, len(b), context.Cause(ctx))
	case errors.Is(err, os.ErrClosed):
		return errInputClosed
	case errors.Is(err, unix.EPIPE), errors.Is(err, unix.EIO):
		return errBrokenPipe
	default:
		return fmt.Errorf("write standard input: %w", err)
	}
}

// end ends the standard input: a pipe is closed, a terminal gets Ctrl-D, which
// is an end of file if the program has it read lines.
func (in *input) end(ctx context.Context) error {
	if in.terminal {
		return in.write(ctx, []byte{endOfTransmission})
	}
	if in.file.Close() != nil {
		return errInputClosed
	}
	return nil
}

// exited ends the writers under way with errInputClosed: the process is gone.
func (in *input) exited() {
	if !in.terminal {
		_ = in.file.Close()
	}
}
