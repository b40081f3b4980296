package qemu

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"unicode"
)

// Names in a run directory.
const (
	qmpSocket     = "qmp.sock"
	consoleSocket = "console.sock"
	agentSocket   = "agent.sock"
	pidFile       = "pid"
	qemuLog       = "qemu.log"
)

const (
	// maxSocketPath is what fits into sockaddr_un with its terminating NUL.
	maxSocketPath = 107
	// A qemu.log beyond logLimit is cut down to its last logKeep bytes.
	logLimit = 256 << 10
	logKeep  = 64 << 10
	// lastWords is how much of qemu.log goes into an error.
	lastWords = 2 << 10
)

// runDir is one machine's run directory.
type runDir string

func (d runDir) path(name string) string { return filepath.Join(string(d), name) }

// make creates the directory; fs.ErrExist if there is one.
func (d runDir) make() error {
	if err := os.Mkdir(string(d), 0o700); err != nil {
		return fmt.Errorf("make run directory: %w", err)
	}
	return nil
}

// remove deletes the directory and what is in it.
func (d runDir) remove() error {
	if err := os.RemoveAll(string(d)); err != nil {
		return fmt.Errorf("remove run directory: %w", err)
	}
	return nil
}

// listen binds a socket that QEMU will serve and returns it as a file. The
// socket's name stays when the file is closed.
func (d runDir) listen(name string) (*os.File, error) {
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: d.path(name), Net: "unix"})
	if err != nil {
		return nil, err
	}
	l.SetUnlinkOnClose(false)
	f, err := l.File()
	return f, errors.Join(err, l.Close())
}

// openLog opens qemu.log for a process to append to.
func (d runDir) openLog() (*os.File, error) {
	return os.OpenFile(d.path(qemuLog), os.O_WRONLY|os.O_APPEND|os.O_CREATE, 0o600)
}

// trimLog bounds qemu.log. What QEMU writes between the reading of the tail and
// the cut is lost.
func (d runDir) trimLog(limit, keep int64) error {
	f, err := os.OpenFile(d.path(qemuLog), os.O_RDWR|os.O_APPEND, 0)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	defer f.Close()
	st, err := f.Stat()
	if err != nil || st.Size() <= limit {
		return err
	}
	tail := make([]byte, keep)
	n, err := f.ReadAt(tail, st.Size()-keep)
	if err != nil && !errors.Is(err, io.EOF) {
		return err
	}
	// QEMU's descriptor appends, so its next line follows the tail.
	if err := f.Truncate(0); err != nil {
		return err
	}
	_, err = f.Write(tail[:n])
	return err
}

// timestamp is what -msg timestamp=on puts before each message, and prefix what
// QEMU puts there itself.
var timestamp = regexp.MustCompile(`(?m)^\d{4}-\d\d-\d\dT[\d:.]+Z (qemu-system-x86_64: )?`)

// lastWords is the end of qemu.log for people: on one line, without time
// stamps and control characters. It is empty if there is nothing.
func (d runDir) lastWords() string {
	b, err := readTail(d.path(qemuLog), lastWords)
	if err != nil {
		return ""
	}
	s := timestamp.ReplaceAllString(string(b), "")
	var lines []string
	for l := range strings.Lines(s) {
		if l = strings.TrimSpace(printable(l)); l != "" {
			lines = append(lines, l)
		}
	}
	return strings.Join(lines, "; ")
}

// readTail reads the last n bytes of a file.
func readTail(path string, n int64) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	st, err := f.Stat()
	if err != nil {
		return nil, err
	}
	return io.ReadAll(io.NewSectionReader(f, max(0, st.Size()-n), n))
}

// printable replaces what could act on a terminal.
func printable(s string) string {
	return strings.Map(func(r rune) rune {
		switch {
		case r == '\n' || r == '\t' || r == '\r':
			return ' '
		case unicode.IsPrint(r):
			return r
		}
		return '�'
	}, strings.ToValidUTF8(s, "�"))
}

// writePID records pid for people and scripts; the daemon itself goes by its
// records and by the processes' command lines. It is whole or absent after a
// crash of the daemon, and needs no fsync: no process outlives the host.
func (d runDir) writePID(pid int) error {
	tmp := d.path(pidFile + ".new")
	if err := os.WriteFile(tmp, fmt.Appendf(nil, "%d\n", pid), 0o600); err != nil {
		return fmt.Errorf("write pid file: %w", err)
	}
	if err := os.Rename(tmp, d.path(pidFile)); err != nil {
		return fmt.Errorf("write pid file: %w", err)
	}
	return nil
}
