// Package qmp is a client of QEMU's machine protocol: JSON lines over the Unix
// socket of one machine.
//
// It speaks and listens; it decides nothing. Which commands are sent, and what
// an event means, is package qemu's business.
//
// The other end is a QEMU that a hostile guest may have taken over. So a line
// has a length limit, an answer must belong to a command that was sent, event
// queues are bounded (what does not fit is counted, not kept), and whatever is
// not the protocol ends the connection. Nothing waits for ever: a command ends
// with its context or after [Options.Timeout], whichever is first, and all of
// them at once when the connection ends.
//
// QEMU serves one client of a socket at a time: a second connection waits for
// its greeting until the first is closed.
//
// Facts are from QEMU's docs/interop/qmp-spec: a greeting {"QMP":…} comes
// first; qmp_capabilities ends the negotiation; answers carry the id of their
// command; events {"event":…} may come between any two lines.
//
// Locks: Client.mu only, never held across I/O. One goroutine, the reader,
// belongs to a Client; Close waits for it.
package qmp

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"sync"
	"time"
)

// Limits that apply where [Options] say nothing.
const (
	// DefaultTimeout bounds one command. What agentiso sends takes
	// milliseconds; a QEMU that needs longer is stuck or its host is.
	DefaultTimeout = 10 * time.Second
	// DefaultMaxLine bounds one line from QEMU. The longest answer of QEMU 7.2
	// (query-qmp-schema) is under 300 KiB.
	DefaultMaxLine = 1 << 20
)

// Options are the limits of one connection; zero fields are the defaults.
type Options struct {
	Timeout time.Duration // of one command, the greeting's included
	MaxLine int           // bytes
}

// ErrClosed reports a connection that this side has closed.
var ErrClosed = errors.New("qmp: connection closed")

// An Error is a command that QEMU has refused.
type Error struct {
	Command string
	Class   string // "GenericError", "CommandNotFound", "DeviceNotFound", …
	Desc    string // for people; QEMU's words, control characters removed
}

func (e *Error) Error() string { return fmt.Sprintf("%s: %s", e.Command, e.Desc) }

// A ProtocolError is a peer that does not speak the protocol. It ends the
// connection.
type ProtocolError struct {
	Reason string
}

func (e *ProtocolError) Error() string { return "qmp: " + e.Reason }

// Version is what a QEMU says of itself in its greeting.
type Version struct {
	Major, Minor, Micro int
	Package             string // the distribution's, "Debian 1:7.2+dfsg-7"
}

// Client is one connection. Its methods may be called concurrently.
type Client struct {
	conn    *net.UnixConn
	opts    Options
	version Version

	writing chan struct{} // holds a token while a command is being written
	done    chan struct{} // closed when the reader has ended

	mu      sync.Mutex
	nextID  uint64
	pending map[uint64]chan<- message
	subs    map[*Subscription]struct{}
	err     error // why the connection ended; set once
}

// Dial connects to the socket at path and negotiates. An error leaves nothing
// open.
func Dial(ctx context.Context, path string, opts Options) (*Client, error) {
	conn, err := (&net.Dialer{}).DialContext(ctx, "unix", path)
	if err != nil {
		return nil, fmt.Errorf("dial qmp: %w", err)
	}
	return New(ctx, conn.(*net.UnixConn), opts)
}

// New negotiates over conn and takes it over: an error closes it.
func New(ctx context.Context, conn *net.UnixConn, opts Options) (*Client, error) {
	if opts.Timeout <= 0 {
		opts.Timeout = DefaultTimeout
	}
	if opts.MaxLine <= 0 {
		opts.MaxLine = DefaultMaxLine
	}
	c := &Client{
		conn:    conn,
		opts:    opts,
		writing: make(chan struct{}, 1),
		done:    make(chan struct{}),
		pending: map[uint64]chan<- message{},
		subs:    map[*Subscription]struct{}{},
	}
	ctx, cancel := context.WithTimeout(ctx, opts.Timeout)
	defer cancel()
	greeting := make(chan Version, 1)
	go c.read(greeting)
	select {
	case c.version = <-greeting:
	case <-c.done:
		return nil, fmt.Errorf("await qmp greeting: %w", c.Err())
	case <-ctx.Done():
		c.Close()
		return nil, fmt.Errorf("await qmp greeting: %w", ctx.Err())
	}
	if err := c.Do(ctx, "qmp_capabilities", nil, nil); err != nil {
		c.Close()
		return nil, err
	}
	return c, nil
}

// Version is the greeting's.
func (c *Client) Version() Version { return c.version }

// Done is closed when the connection has ended, from either side. Every event
// that came before the end has been queued by then.
func (c *Client) Done() <-chan struct{} { return c.done }

// Err says why the connection ended; nil while it stands. The peer's orderly
// end is io.EOF.
func (c *Client) Err() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.err
}

// Close ends the connection and waits for the reader. Commands that wait end
// with [ErrClosed]. QEMU runs on.
func (c *Client) Close() error {
	c.fail(ErrClosed)
	<-c.done
	return nil
}

// Do sends one command and waits for its answer, which is decoded into result
// unless that is nil. args is an object (a struct or a map) or nil. The error
// is an [*Error] if QEMU refused, the context's if that ended first, and the
// connection's otherwise. After a context's end QEMU may still carry the
// command out; its late answer is dropped.
func (c *Client) Do(ctx context.Context, command string, args, result any) error {
	return c.DoFiles(ctx, command, args, result)
}

// DoFiles is [Client.Do] with open files passed along, for getfd and add-fd:
// QEMU receives duplicates, the caller keeps and closes its own. QEMU 7.2
// takes one file with a command.
func (c *Client) DoFiles(ctx context.Context, command string, args, result any, files ...*os.File) error {
	if err := ctx.Err(); err != nil {
		return fmt.Errorf("%s: %w", command, err)
	}
	ctx, cancel := context.WithTimeout(ctx, c.opts.Timeout)
	defer cancel()
	fds, err := duplicate(files)
	defer closeAll(fds)
	if err != nil {
		return fmt.Errorf("%s: %w", command, err)
	}
	answer := make(chan message, 1) // the reader must never wait
	id, err := c.expect(answer)
	if err != nil {
		return fmt.Errorf("%s: %w", command, err)
	}
	defer c.forget(id)
	line, err := encode(command, args, id)
	if err != nil {
		return err
	}
	if err := c.write(ctx, line, fds); err != nil {
		return fmt.Errorf("%s: %w", command, err)
	}
	select {
	case m := <-answer:
		return m.decode(command, result)
	case <-ctx.Done():
		return fmt.Errorf("%s: %w", command, ctx.Err())
	case <-c.done:
	}
	select {
	case m := <-answer: // quit is answered in the last line of all
		return m.decode(command, result)
	default:
		return fmt.Errorf("%s: %w", command, c.Err())
	}
}

// expect registers answer under a fresh id.
func (c *Client) expect(answer chan<- message) (uint64, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.err != nil {
		return 0, c.err
	}
	c.nextID++
	c.pending[c.nextID] = answer
	return c.nextID, nil
}

func (c *Client) forget(id uint64) {
	c.mu.Lock()
	defer c.mu.Unlock()
	delete(c.pending, id)
}

// fail records the first reason for the end and closes the connection, which
// ends the reader.
func (c *Client) fail(err error) {
	c.mu.Lock()
	first := c.err == nil
	if first {
		c.err = err
	}
	c.mu.Unlock()
	if first {
		c.conn.Close() // the cause is err; a failing close adds nothing
	}
}

// message is one line from QEMU, of any sort.
type message struct {
	QMP *struct {
		Version struct {
			QEMU struct {
				Major int `json:"major"`
				Minor int `json:"minor"`
				Micro int `json:"micro"`
			} `json:"qemu"`
			Package string `json:"package"`
		} `json:"version"`
	} `json:"QMP"`
	Event     string          `json:"event"`
	Data      json.RawMessage `json:"data"`
	Timestamp struct {
		Seconds      int64 `json:"seconds"`
		Microseconds int64 `json:"microseconds"`
	} `json:"timestamp"`
	Return json.RawMessage `json:"return"`
	Error  *struct {
		Class string `json:"class"`
		Desc  string `json:"desc"`
	} `json:"error"`
	ID *uint64 `json:"id"`
}

// decode turns an answer into the result or error of command.
func (m message) decode(command string, result any) error {
	if m.Error != nil {
		return &Error{Command: command, Class: printable(m.Error.Class), Desc: printable(m.Error.Desc)}
	}
	if result == nil {
		return nil
	}
	if err := json.Unmarshal(m.Return, result); err != nil {
		return fmt.Errorf("%s: decode answer: %w", command, err)
	}
	return nil
}
