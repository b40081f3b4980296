package boot

import (
	"errors"
	"io"
	"log/slog"
	"sync"

	"golang.org/x/sys/unix"
)

// prefix begins every line, so that the agent's can be told from the kernel's.
const prefix = "agentiso: "

// Console writes lines to the machine's console without ever waiting for it: a
// console that nobody drains, or that a user has stopped with ^S, loses lines
// rather than stop the agent. Without a console device lines go to the kernel's
// log.
type Console struct {
	devices []string // the first that opens

	mu sync.Mutex
	fd int // -1: not open
}

// NewConsole opens the console. It is opened again when the image's init has
// hung it up, and at the next line when it could not be opened; the first
// process holds it from its start, so that it can say what went wrong also
// while it has no /dev.
func NewConsole() *Console { return openConsole("/dev/console", "/dev/kmsg") }

func openConsole(devices ...string) *Console {
	c := &Console{devices: devices, fd: -1}
	c.open()
	return c
}

// Write writes p, or loses it, and never fails.
func (c *Console) Write(p []byte) (int, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for range 2 {
		if c.fd < 0 && !c.open() {
			break
		}
		_, err := unix.Write(c.fd, p)
		if !errors.Is(err, unix.EIO) {
			break // written, or lost on purpose
		}
		unix.Close(c.fd)
		c.fd = -1
	}
	return len(p), nil
}

func (c *Console) open() bool {
	for _, dev := range c.devices {
		fd, err := unix.Open(dev, unix.O_WRONLY|unix.O_NOCTTY|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
		if err == nil {
			c.fd = fd
			return true
		}
	}
	return false
}

// NewLogger returns a logger of one-line messages to w, each with the prefix.
// Values with control bytes come quoted, so that nothing a guest process says
// can pose as a line of its own.
func NewLogger(w io.Writer, level slog.Leveler) *slog.Logger {
	return slog.New(slog.NewTextHandler(prefixer{w}, &slog.HandlerOptions{
		Level: level,
		ReplaceAttr: func(groups []string, a slog.Attr) slog.Attr {
			// The host stamps console lines with its own clock.
			if len(groups) == 0 && a.Key == slog.TimeKey {
				return slog.Attr{}
			}
			return a
		},
	}))
}

// prefixer puts prefix before each write; a slog handler makes one per record.
type prefixer struct{ w io.Writer }

func (p prefixer) Write(b []byte) (int, error) {
	if _, err := p.w.Write(append([]byte(prefix), b...)); err != nil {
		return 0, err
	}
	return len(b), nil
}
