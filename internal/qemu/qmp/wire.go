package qmp

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"syscall"
	"time"
	"unicode"
)

// maxFiles is how many open files go with one command; the kernel's own limit
// (SCM_MAX_FD) is 253.
const maxFiles = 16

// request is a command on the wire.
type request struct {
	Execute   string `json:"execute"`
	Arguments any    `json:"arguments,omitempty"`
	ID        uint64 `json:"id"`
}

func encode(command string, args any, id uint64) ([]byte, error) {
	b, err := json.Marshal(request{command, args, id})
	if err != nil {
		return nil, fmt.Errorf("%s: encode arguments: %w", command, err)
	}
	return append(b, '\n'), nil
}

// write sends line whole, with fds beside its first byte. A line that could be
// sent only in part leaves the peer in the middle of a command, so it ends the
// connection; a context that ended before the first byte does not.
func (c *Client) write(ctx context.Context, line []byte, fds []int) error {
	select {
	case c.writing <- struct{}{}:
	case <-ctx.Done():
		return ctx.Err()
	case <-c.done:
		return c.Err()
	}
	defer func() { <-c.writing }()

	// A deadline in the past is what interrupts a write that is under way.
	if err := c.conn.SetWriteDeadline(time.Time{}); err != nil {
		return c.cause(err)
	}
	fired := make(chan struct{})
	stop := context.AfterFunc(ctx, func() {
		defer close(fired)
		_ = c.conn.SetWriteDeadline(time.Unix(1, 0)) // fails on a closed connection alone
	})
	n, err := c.send(line, fds)
	if !stop() {
		<-fired // or it would cut off the next writer
	}
	switch {
	case err == nil:
		return nil
	case n > 0:
		c.fail(fmt.Errorf("qmp: command cut off after %d of %d bytes: %w", n, len(line), err))
	case ctx.Err() == nil:
		c.fail(err)
	}
	if ctx.Err() != nil {
		return ctx.Err()
	}
	return c.cause(err)
}

func (c *Client) send(line []byte, fds []int) (int, error) {
	if len(fds) == 0 {
		return c.conn.Write(line)
	}
	n, _, err := c.conn.WriteMsgUnix(line, syscall.UnixRights(fds...), nil)
	if err != nil || n == len(line) {
		return n, err
	}
	m, err := c.conn.Write(line[n:])
	return n + m, err
}

// duplicate makes descriptors that stay valid while they are being sent,
// whatever the caller does with its files. The result is to be closed also
// when there is an error.
func duplicate(files []*os.File) (fds []int, err error) {
	if len(files) > maxFiles {
		return nil, fmt.Errorf("pass %d files: at most %d", len(files), maxFiles)
	}
	for _, f := range files {
		raw, err := f.SyscallConn()
		if err != nil {
			return fds, err
		}
		var errno syscall.Errno
		err = raw.Control(func(u uintptr) {
			var fd uintptr
			fd, _, errno = syscall.Syscall(syscall.SYS_FCNTL, u, syscall.F_DUPFD_CLOEXEC, 0)
			if errno == 0 {
				fds = append(fds, int(fd))
			}
		})
		if err != nil {
			return fds, err
		}
		if errno != 0 {
			return fds, os.NewSyscallError("dup", errno)
		}
	}
	return fds, nil
}

func closeAll(fds []int) {
	for _, fd := range fds {
		_ = syscall.Close(fd) // a duplicate: nothing is lost with it
	}
}

// cause prefers the reason for the connection's end to its symptom.
func (c *Client) cause(err error) error {
	if e := c.Err(); e != nil {
		return e
	}
	return err
}

// read is the reader goroutine: it gives answers to those who wait for them
// and events to subscribers until the connection ends.
func (c *Client) read(greeting chan<- Version) {
	err := c.readLines(greeting)
	c.fail(err)
	c.mu.Lock()
	for s := range c.subs {
		close(s.events)
	}
	c.subs = nil
	c.mu.Unlock()
	close(c.done)
}

func (c *Client) readLines(greeting chan<- Version) error {
	// The scanner grows its buffer as lines need it, up to the limit.
	lines := bufio.NewScanner(c.conn)
	lines.Buffer(make([]byte, 0, 4096), c.opts.MaxLine)
	greeted := false
	for lines.Scan() {
		m, err := parse(lines.Bytes())
		if err != nil {
			return err
		}
		switch {
		case m.QMP != nil:
			if greeted {
				return &ProtocolError{"second greeting"}
			}
			greeted = true
			v := m.QMP.Version
			greeting <- Version{v.QEMU.Major, v.QEMU.Minor, v.QEMU.Micro, printable(v.Package)}
		case !greeted:
			return &ProtocolError{"no greeting"}
		case m.Event != "":
			c.publish(m)
		default:
			if err := c.answer(m); err != nil {
				return err
			}
		}
	}
	switch err := lines.Err(); {
	case errors.Is(err, bufio.ErrTooLong):
		return &ProtocolError{fmt.Sprintf("line longer than %d bytes", c.opts.MaxLine)}
	case err != nil:
		return err
	}
	return io.EOF
}

func (c *Client) answer(m message) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if *m.ID > c.nextID {
		return &ProtocolError{fmt.Sprintf("answer to command %d, which was not sent", *m.ID)}
	}
	if ch, ok := c.pending[*m.ID]; ok { // else its caller has given up
		delete(c.pending, *m.ID)
		ch <- m
	}
	return nil
}

// parse reads one line and checks that it is one of the four sorts: greeting,
// event, result, refusal. What it returns does not share memory with line.
func parse(line []byte) (message, error) {
	line = bytes.TrimSuffix(line, []byte("\r"))
	var m message
	if err := json.Unmarshal(line, &m); err != nil {
		return message{}, &ProtocolError{fmt.Sprintf("not JSON: %v", err)}
	}
	sorts := 0
	for _, is := range []bool{m.QMP != nil, m.Event != "", m.Return != nil, m.Error != nil} {
		if is {
			sorts++
		}
	}
	if sorts != 1 {
		return message{}, &ProtocolError{"line is not exactly one of greeting, event, result and error"}
	}
	if (m.Return != nil || m.Error != nil) && m.ID == nil {
		if m.Error != nil { // QEMU could not read our line
			return message{}, &ProtocolError{"peer: " + printable(m.Error.Desc)}
		}
		return message{}, &ProtocolError{"answer without an id"}
	}
	return m, nil
}

// printable replaces control characters, so that a peer's words may be shown
// on a terminal, and bounds their length.
func printable(s string) string {
	const limit = 2 << 10
	if len(s) > limit {
		s = s[:limit]
	}
	return strings.Map(func(r rune) rune {
		if unicode.IsPrint(r) || r == ' ' {
			return r
		}
		return '�'
	}, strings.ToValidUTF8(s, "�"))
}
