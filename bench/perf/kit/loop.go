package main

import (
	"errors"
	"syscall"
	"time"
	"unsafe"
)

// The head of a message is never larger than this here; more is a peer gone wrong.
const maxHead = 64 * 1024

// poller is epoll with the descriptor as the only thing remembered.
type poller struct {
	fd     int
	events []syscall.EpollEvent
}

func newPoller() (*poller, error) {
	fd, err := syscall.EpollCreate1(syscall.EPOLL_CLOEXEC)
	return &poller{fd, make([]syscall.EpollEvent, 512)}, err
}

const (
	readable = uint32(syscall.EPOLLIN | syscall.EPOLLRDHUP)
	writable = uint32(syscall.EPOLLOUT)
)

func (p *poller) add(fd int, interest uint32) error {
	return syscall.EpollCtl(p.fd, syscall.EPOLL_CTL_ADD, fd, &syscall.EpollEvent{Events: interest, Fd: int32(fd)})
}

func (p *poller) change(fd int, interest uint32) error {
	return syscall.EpollCtl(p.fd, syscall.EPOLL_CTL_MOD, fd, &syscall.EpollEvent{Events: interest, Fd: int32(fd)})
}

// wait returns what is ready, after at most the given time; a negative one means for ever.
func (p *poller) wait(atMost time.Duration) ([]syscall.EpollEvent, error) {
	milliseconds := -1
	if atMost >= 0 {
		// Rounded up, or the last fraction of a millisecond would be spent spinning.
		milliseconds = int((atMost + time.Millisecond - 1) / time.Millisecond)
	}
	for {
		n, err := syscall.EpollWait(p.fd, p.events, milliseconds)
		if errors.Is(err, syscall.EINTR) {
			continue
		}
		if err != nil {
			return nil, err
		}
		return p.events[:n], nil
	}
}

// The raw calls tell the Go scheduler nothing, which is right for descriptors that never block.

func rawRead(fd int, into []byte) (int, syscall.Errno) {
	n, _, errno := syscall.RawSyscall(syscall.SYS_READ, uintptr(fd), uintptr(unsafe.Pointer(&into[0])), uintptr(len(into)))
	return int(n), errno
}

func rawWrite(fd int, data []byte) (int, syscall.Errno) {
	n, _, errno := syscall.RawSyscall(syscall.SYS_WRITE, uintptr(fd), uintptr(unsafe.Pointer(&data[0])), uintptr(len(data)))
	return int(n), errno
}

func now() int64 {
	var spec syscall.Timespec
	const clockMonotonic = 1
	_, _, _ = syscall.RawSyscall(syscall.SYS_CLOCK_GETTIME, clockMonotonic, uintptr(unsafe.Pointer(&spec)), 0)
	return spec.Nano()
}

// header returns the value of a header in a head, without looking at case; the name ends with a colon.
func header(head []byte, name string) []byte {
	for start := 0; start < len(head); {
		end := start
		for end < len(head) && head[end] != '\n' {
			end++
		}
		line := head[start:end]
		start = end + 1
		if len(line) <= len(name) || !sameLetters(line[:len(name)], name) {
			continue
		}
		value := line[len(name):]
		for len(value) > 0 && (value[0] == ' ' || value[0] == '\t') {
			value = value[1:]
		}
		for len(value) > 0 && (value[len(value)-1] == '\r' || value[len(value)-1] == ' ') {
			value = value[:len(value)-1]
		}
		return value
	}
	return nil
}

func sameLetters(text []byte, lower string) bool {
	for i := range text {
		letter := text[i]
		if 'A' <= letter && letter <= 'Z' {
			letter += 'a' - 'A'
		}
		if letter != lower[i] {
			return false
		}
	}
	return true
}

func number(text []byte) (int, bool) {
	value := 0
	for _, digit := range text {
		if digit < '0' || digit > '9' || value > 1<<40 {
			return 0, false
		}
		value = value*10 + int(digit-'0')
	}
	return value, len(text) > 0
}

// body takes the framing off a message's body, piece by piece.
type body struct {
	chunked bool
	left    int // of the body, or of the chunk
	state   chunkState
	digits  int
}

type chunkState int

const (
	inSize chunkState = iota
	inExtension
	inData
	afterData
	inTrailer
	inTrailerLine
	done
)

var errFraming = errors.New("bad chunk framing")

// take gives the content of data to the sink, and returns what is left of data after the end of the body.
func (b *body) take(data []byte, sink func([]byte)) ([]byte, error) {
	if !b.chunked {
		n := min(b.left, len(data))
		if n > 0 {
			sink(data[:n])
		}
		b.left -= n
		if b.left == 0 {
			b.state = done
		}
		return data[n:], nil
	}
	for len(data) > 0 && b.state != done {
		switch b.state {
		case inData:
			n := min(b.left, len(data))
			sink(data[:n])
			data = data[n:]
			b.left -= n
			if b.left == 0 {
				b.state = afterData
			}
			continue
		case inSize:
			letter := data[0]
			digit := -1
			switch {
			case '0' <= letter && letter <= '9':
				digit = int(letter - '0')
			case 'a' <= letter && letter <= 'f':
				digit = int(letter-'a') + 10
			case 'A' <= letter && letter <= 'F':
				digit = int(letter-'A') + 10
			}
			switch {
			case digit >= 0 && b.digits < 8:
				b.left, b.digits = b.left<<4|digit, b.digits+1
			case (letter == ';' || letter == '\r' || letter == ' ') && b.digits > 0:
				b.state = inExtension
			default:
				return nil, errFraming
			}
		case inExtension:
			if data[0] == '\n' {
				b.digits = 0
				b.state = inData
				if b.left == 0 {
					b.state = inTrailer
				}
			}
		case afterData:
			if data[0] == '\n' {
				b.state = inSize
			} else if data[0] != '\r' {
				return nil, errFraming
			}
		case inTrailer:
			if data[0] == '\n' {
				b.state = done
			} else if data[0] != '\r' {
				b.state = inTrailerLine
			}
		case inTrailerLine:
			if data[0] == '\n' {
				b.state = inTrailer
			}
		}
		data = data[1:]
	}
	return data, nil
}

func listen() (fd int, port int, err error) {
	fd, err = syscall.Socket(syscall.AF_INET, syscall.SOCK_STREAM|syscall.SOCK_NONBLOCK|syscall.SOCK_CLOEXEC, 0)
	if err != nil {
		return 0, 0, err
	}
	if err = syscall.Bind(fd, &syscall.SockaddrInet4{Addr: [4]byte{127, 0, 0, 1}}); err != nil {
		return 0, 0, err
	}
	if err = syscall.Listen(fd, 4096); err != nil {
		return 0, 0, err
	}
	name, err := syscall.Getsockname(fd)
	if err != nil {
		return 0, 0, err
	}
	return fd, name.(*syscall.SockaddrInet4).Port, nil
}

func noDelay(fd int) {
	_ = syscall.SetsockoptInt(fd, syscall.IPPROTO_TCP, syscall.TCP_NODELAY, 1)
}
