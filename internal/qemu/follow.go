package qemu

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"strings"
)

// followChunk is the most that Follow hands over at once.
const followChunk = 64 << 10

// Tail returns at most the last n bytes that the present or last machine of id
// printed: raw bytes of a hostile guest. Of a machine that an earlier daemon
// started it may reach back into the one before.
func (o *Owner) Tail(id string, n int) []byte {
	c := o.console(id)
	if c == nil || n <= 0 {
		return nil
	}
	return c.lastOutput(min(n, 2*consoleLimit))
}

// lastOutput is at most the last n bytes of the present machine's output.
func (c *console) lastOutput(n int) []byte {
	var out []byte
	for from := c.tailFrom(int64(n), true); len(out) < n; {
		p := make([]byte, n-len(out))
		got, next, _, _, err := c.read(p, from)
		if err != nil || got == 0 {
			break
		}
		out, from = append(out, p[:got]...), next
	}
	return out
}

// Follow calls fn with the last tailBytes of what is kept of id's consoles,
// then with what comes, until ctx is done, fn returns an error (which Follow
// returns), or no machine of id is left. A reader slower than the guest loses
// what is rotated away. The bytes are raw and belong to fn until it returns.
func (o *Owner) Follow(ctx context.Context, id string, tailBytes int64, fn func([]byte) error) error {
	c := o.console(id)
	if c == nil {
		return nil
	}
	from := c.tailFrom(tailBytes, false)
	buf := make([]byte, followChunk)
	for {
		if err := ctx.Err(); err != nil {
			return err
		}
		n, next, changed, live, err := c.read(buf, from)
		if errors.Is(err, fs.ErrNotExist) {
			return nil // removed
		}
		if err != nil {
			return fmt.Errorf("follow console %s: %w", id, err)
		}
		from = next
		switch {
		case n > 0:
			if err := fn(buf[:n]); err != nil {
				return err
			}
		case !live:
			return nil
		default:
			select {
			case <-changed:
			case <-ctx.Done():
				return ctx.Err()
			}
		}
	}
}

// RemoveConsole deletes what is kept of id's consoles and how its last machine
// ended.
func (o *Owner) RemoveConsole(id string) error {
	c := o.console(id)
	if c == nil {
		return nil
	}
	o.mu.Lock()
	delete(o.consoles, id)
	delete(o.exits, id)
	o.mu.Unlock()
	return c.remove()
}

// ListConsoles names the ids of which anything is kept.
func (o *Owner) ListConsoles(context.Context) ([]string, error) {
	entries, err := os.ReadDir(o.opts.ConsoleDir)
	if err != nil {
		return nil, fmt.Errorf("list consoles: %w", err)
	}
	var names []string
	for _, e := range entries {
		id, _, _ := strings.Cut(e.Name(), ".")
		names = append(names, id)
	}
	return ids(names), nil
}

// console returns the console of id, nil if that cannot be an id.
func (o *Owner) console(id string) *console {
	if !idPattern.MatchString(id) {
		return nil
	}
	o.mu.Lock()
	defer o.mu.Unlock()
	c, ok := o.consoles[id]
	if !ok {
		c = openConsole(o.opts.ConsoleDir, id, o.opts.consoleLimit)
		o.consoles[id] = c
	}
	return c
}
