package qmp

import (
	"encoding/json"
	"slices"
	"sync/atomic"
	"time"
)

// Event is something that QEMU reports by itself.
type Event struct {
	Name string // "SHUTDOWN"
	Time time.Time
	Data json.RawMessage // an object; nil if there is none
}

// Subscription is a bounded queue of events.
type Subscription struct {
	client *Client
	names  []string
	events chan Event
	lost   atomic.Uint64
}

// Subscribe queues events with the given names, all of them if there are none,
// up to size (1 and more). A queue that is full keeps what it has: a guest that
// provokes events without end cannot push out an earlier one. Subscribe to
// what matters alone, so that nothing else takes its place.
func (c *Client) Subscribe(size int, names ...string) *Subscription {
	s := &Subscription{client: c, names: slices.Clone(names), events: make(chan Event, max(1, size))}
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.subs == nil { // the reader has ended
		close(s.events)
		return s
	}
	c.subs[s] = struct{}{}
	return s
}

// Events is the queue; it is closed when the connection or the subscription
// ends, after what is left in it has been read.
func (s *Subscription) Events() <-chan Event { return s.events }

// Lost counts the events that did not fit.
func (s *Subscription) Lost() uint64 { return s.lost.Load() }

// Close ends the subscription.
func (s *Subscription) Close() {
	s.client.mu.Lock()
	defer s.client.mu.Unlock()
	if _, ok := s.client.subs[s]; ok {
		delete(s.client.subs, s)
		close(s.events)
	}
}

func (c *Client) publish(m message) {
	e := Event{
		Name: m.Event,
		Time: time.Unix(m.Timestamp.Seconds, m.Timestamp.Microseconds*1000),
		Data: m.Data,
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	for s := range c.subs {
		if len(s.names) > 0 && !slices.Contains(s.names, e.Name) {
			continue
		}
		select {
		case s.events <- e:
		default:
			s.lost.Add(1)
		}
	}
}
