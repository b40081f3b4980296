package port

import (
	"sync"

	"github.com/agentiso/agentiso/internal/link/wire"
)

// rawBuffer is how much a measurement moves at a time; as much as the driver
// takes in one write.
const rawBuffer = portWrite

// raw serves a measurement of the port by itself. It ends early when the host
// leaves or says hello.
func (s *Serial) raw(start wire.Frame) error {
	s.in.wait = false
	switch start.Mode {
	case wire.Sink:
		return s.sink(start.Size)
	case wire.Source:
		return s.source(start.Size)
	case wire.Echo:
		return s.echo(start.Size)
	}
	return nil
}

// readZeros reads up to size zero bytes into buf. A read that ends in
// anything else is the next session's hello; it is put back.
func (s *Serial) readZeros(buf []byte, size int64) (int, error) {
	n, err := s.in.Read(buf[:min(int64(len(buf)), size)])
	if n > 0 && buf[n-1] != 0 {
		s.in.unread(buf[:n])
		return 0, wire.ErrAnew
	}
	return n, err
}

func (s *Serial) sink(size int64) error {
	buf := make([]byte, rawBuffer)
	for size > 0 {
		n, err := s.readZeros(buf, size)
		if err != nil {
			return err
		}
		size -= int64(n)
	}
	_, err := s.dev.Write([]byte{wire.SinkDone})
	return err
}

func (s *Serial) echo(size int64) error {
	buf := make([]byte, rawBuffer)
	for size > 0 {
		n, err := s.readZeros(buf, size)
		if err != nil {
			return err
		}
		if _, err := s.dev.Write(buf[:n]); err != nil {
			return err
		}
		size -= int64(n)
	}
	return nil
}

// source writes while a goroutine watches for the host's next word, which
// must end it: a host that left and came back unseen never reads the rest.
func (s *Serial) source(size int64) error {
	var watch sync.WaitGroup
	watch.Go(func() {
		var b [wire.FrameSize]byte
		n, err := s.in.Read(b[:])
		s.in.unread(b[:n])
		if n > 0 || !interrupted(err) {
			_ = s.dev.SetDeadline(past)
		}
	})
	buf := make([]byte, rawBuffer)
	var err error
	for size > 0 && err == nil {
		var n int
		n, err = s.dev.Write(buf[:min(int64(len(buf)), size)])
		size -= int64(n)
	}
	_ = s.dev.SetDeadline(past)
	watch.Wait()
	if interrupted(err) {
		err = wire.ErrAnew
	}
	return err
}
